"""Measuring: `ringjax bench attention`, `ringjax bench train` and `ringjax bench generate`.

    config       the options of the commands
    workload     masks, useful FLOPs and inputs
    oracle       attention of some queries in float64, by the formula
    check        nothing is timed before it was compared with that
    still        rings that leave the rotations out, for measuring only
    programs     what is timed, as compiled functions
    timing       warm-up, turns, spread
    attention    `ringjax bench attention`
    train        `ringjax bench train`
    generate     `ringjax bench generate`
    trace        where the time of a profiled step goes
    table, plot  what people read
    environment  hardware and versions

How each number comes about: docs/benchmarks.md.
"""
