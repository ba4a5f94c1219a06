"""The built-in world: drawn images of coloured shapes, and questions whose answers are known.

`draw` makes a Scene and its image, `questions` asks about a Scene. They train the bundled checkpoint and
measure what pruning costs, without any download.
"""
