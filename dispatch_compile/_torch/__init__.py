"""Every private name of torch that the package uses, by subject, each with the reason. Nothing else imports one.

``tests/_torch/test_torch_private.py`` fails by name when torch changes any of them.
"""
