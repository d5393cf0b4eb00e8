def unsupported(q,k,v): return "not yet"
