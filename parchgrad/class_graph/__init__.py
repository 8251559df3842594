"""What a model's classes are made of: their selected channels, how these influence each other, who resembles whom.

After Summit (Hohman et al., "Summit: Scaling Deep Learning Interpretability by Visualizing Activation and Attribution
Summarizations", 2019). `load` opens what `parchgrad class-graph build` has written beside a table, without torch;
`build.py` writes it.
"""

from parchgrad.class_graph.graph import (
    ChannelView,
    ClassGraph,
    ClassView,
    Comparison,
    Edge,
    Node,
    Serves,
    load,
)

__all__ = ["ChannelView", "ClassGraph", "ClassView", "Comparison", "Edge", "Node", "Serves", "load"]
