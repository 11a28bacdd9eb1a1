"""Web server of photo search: a page and a REST interface over one index.

A request passes through these modules in order: :mod:`connections` (sockets),
:mod:`security` (token, hosts, size and time of bodies), :mod:`app` (routes), :mod:`line` (queue),
:mod:`service` (search) and :mod:`pictures` (decoding in other processes).
"""
