"""What a run will cost, before it runs.

    devices        peaks, memory and links of TPUs and GPUs, and the shares of them that steps reach
    flops          FLOPs of a token against model and context
    work           (query, key) pairs for each device and hop of a ring, for any layout and reach
    traffic        bytes that a ring sends, and from which length on they hide behind the compute
    memory         bytes of a device at the fullest moment of a step, by kind
    communication  what a step sends, and how much of it nothing hides
    step_time      how long a step takes, and what takes it
    plan, search   a stage on a machine; the best way to run it there
    ahead, gpus    compiling for machines that are not there
    hlo, compiled  what a compiled program says: memory, what its transfers hide behind
    command, page  `ringjax plan`, and its page
    pictures, plan_pictures, card   figures (matplotlib)
"""
