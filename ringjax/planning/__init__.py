"""What a run will cost, before it runs.

work      (query, key) pairs for each device and hop of a ring, for any layout and reach
traffic   bytes that a ring sends, and from which length on they hide behind the compute
pictures  layouts, ring, work and traffic as figures (matplotlib)
"""
