"""The bodies of opaque ops, with vLLM's own layers in them: ``python -m benchmarks vllm-bodies``.

``bodies`` are the ops, ``variants`` the ways to run their layers, each in a ``worker`` process of its own. ``run`` has
the workers take turns and brings together the ``results``, which ``report`` and ``picture`` show. vLLM is imported in
the workers alone.
"""
