"""The algebra: sites, selections, patches, slots, methods. Knows torch, no method, no model, no file.

``site`` where · ``select`` which · ``patch`` the change and the thing below it · ``method`` how to make one ·
``slot`` all lifecycle, once · ``attach`` put them in and take them out · ``segments`` whose rows · ``errors`` what is
refused. Import from these: this package itself takes nothing in, so that the command line starts without torch.
"""
