"""OpenAI's chat completions over HTTP, for tenants that do not trust each other. No torch, no transformers.

What anybody could try, and which module stands against it (``tests/serve/hostile.py`` tries each):

==============================================================  ==========================================
a key guessed by how long the refusal takes; a key in the log   ``keys`` (hashes, compared in full), ``logs``
names of other tenants' adapters, by asking for them            ``models`` (one answer for unknown and not allowed)
a path, NUL, other letters as an adapter's name                 ``models`` (a reference by its grammar, or unknown)
an alias out of a folder that is nobody's business              ``loading`` (allowed folders, links resolved)
bodies too large, too slow, too many at once; headers too slow  ``gate``, ``listen``
JSON: a name twice, NaN, nested a million deep, half a letter   ``strict``
a picture that is small here and 4 GB decoded                   ``pictures`` (the header is read, nothing is decoded)
a picture's address within our own network, now or at the next  ``remote`` (exact hosts; the checked address is the one
look-up of its name, or by a redirect                           that is connected to; proxies and cookies: none)
two requests in one (length and chunks together)                ``gate`` (refused, the connection ends)
a web page in a browser on this machine that asks 127.0.0.1     ``gate`` (host names), ``strict`` (JSON's media type)
forged lines in the log, labels without end in the metrics      ``logs``, ``metrics``
everything at once                                              ``limits`` (by key, by tenant, overall)
==============================================================  ==========================================
"""
