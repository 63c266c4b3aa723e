"""How the losses are computed without their matrices: each as one operator whose forward computes the gradient.

An operator takes raw rows, normalises them tile by tile, and returns (value, gradient of the student's rows). What it
needs beyond its inputs is O(rows * width), never rows x columns. `engine` makes an operator of a function, and lets it run
on one process's share of a batch; the other modules hold the algorithms.
"""
