"""The benchmark: what an intercepted call costs, and how good its code is, beside all that one could use instead.

``cases`` are the ops and their inputs, ``peers`` the ways to run them, ``timing`` measures, ``compile_time`` does so
for first calls, ``measure`` brings these together into a ``results.Results``, which ``report`` and ``plot`` show.
``ops`` is the command for that. Others are ``breakdown``, where the time of an intercepted call goes;
``passthrough``, what the mode costs the calls that it does not intercept; ``restart``, how soon a new process runs what
an earlier one compiled; ``numerics``, how far results are from eager ones; ``vllm_bodies``, with vLLM's own layers; and
``soak``, which measures no times, but asks whether everything goes right, and on.
"""
