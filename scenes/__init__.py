"""The built-in world: drawn pictures of coloured shapes with questions whose answers are known.

`draw` makes a Scene and its picture, `questions` asks about a Scene. The pictures train the bundled
checkpoint and measure what pruning costs, without any download.
"""
