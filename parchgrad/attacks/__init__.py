"""What a small change of a picture does to prediction, map and channels: the changes, and the comparison.

All of it works on pictures as the model's input shows them: uint8 `(h, w, 3)`, after resizing and before
normalisation. So an attacked picture is a picture: saved as a PNG and read again it is the same input.
"""
