"""The 4-bit operators on a GPU, in Triton.

``linear`` the operators · ``plan`` which kernel, its tiles · ``decode`` the weight unpacked · ``vector`` one row ·
``batch`` some rows, both ways · ``tile`` what kernels unpack and round with · ``update`` a low-rank update ·
``lang`` Triton. With TRITON_INTERPRET=1 from before Triton is imported, all of it runs on the processor, slowly.
"""
