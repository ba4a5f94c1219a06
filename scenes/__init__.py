"""The built-in world: drawn images of coloured shapes with questions whose answers are known.

`draw` makes a Scene and its image, `questions` asks about a Scene. The images train the bundled
checkpoint and measure what pruning costs, without any download.
"""
