"""Weights in 4 bits: the value, its slow reference, and what makes it fast.

``levels`` the tables · ``codec`` encode and decode, the specification · ``state`` bitsandbytes' names in files ·
``tensor`` the weight of a linear layer that is such a value · ``ops`` torch operators · ``native`` the compiled kernel.
Import from these: this package itself takes nothing in.
"""
