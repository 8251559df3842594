"""Measuring saliency maps: metrics that know maps only, mosaics, and the comparison of methods."""
