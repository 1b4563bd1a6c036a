def supports(call):
    return "not built yet"
