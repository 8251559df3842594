"""The pruned engine (method.md section 4): prediction and gradient as a program of its own, without autograd.

At infinite gamma the unselected channels' gradient is zero, so a convolution's input gradient needs only the selected
rows of its weight. `tracing` reads a network as a graph of calls, `program` turns that into steps, `engine` runs them.
"""
