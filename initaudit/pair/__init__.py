"""Pairs every weight at every place of use with the activations downstream of it.

The records (`records`) and the recognition of activations (`activation`) load no torch; `pair.pair` walks the graph.
"""
