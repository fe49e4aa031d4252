"""The demo: opaque custom ops as vLLM writes them, whose bodies call IR ops, run eagerly and under the mode.

``moe`` and ``mla`` are the two ops, ``ir_ops`` where their IR ops come from, ``run`` compares and measures,
``cli`` is the command line.
"""
