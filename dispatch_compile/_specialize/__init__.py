"""All that a call's arguments alone decide: what is baked into compiled code, what stays dynamic, and the guards.

- Baked in: dtypes, devices, ranks, every size and stride but those below, scalars, strings, ``None``, the structure of
  lists and objects, and torch's global state.
- Dynamic: dimension 0 of each activation (the token dimension) from two tokens up, and the strides that are
  multiples of it; and by itself whatever else of that kind was seen to change (:class:`.arguments.Learned`). No tokens
  and one token specialize, as everywhere in torch.
"""
