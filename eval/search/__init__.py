"""Search for policies on the frontier of quality against bytes: which methods, parameters and chains, under a limit."""
