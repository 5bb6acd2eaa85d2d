"""What two processes that never meet must agree on: configuration, wire, journal, versions,
metrics. Never torch.
"""
