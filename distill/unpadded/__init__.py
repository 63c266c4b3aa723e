"""Transformers on the tokens that are there, instead of on a rectangle as wide as its longest text.

Nothing reads the places behind a shorter text (attention masks them, pooling leaves them out), but a transformer computes
them all the same. Two ways around it:

- `linear.skipping`: linear layers, which most of the time goes into, get the tokens alone. For any transformer.
- `trial.end_to_end`: the whole model gets the texts one behind the other, and attention knows where one ends. On CUDA
  in 16 bits, for a model whose attention can be replaced.
"""
