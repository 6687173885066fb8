"""Times Hugging Face transformers' `generate` with SDPA: `python transformers_script.py REQUEST ANSWER`.

Needs PyTorch and transformers, not ringjax. REQUEST is JSON with `cases`, each a LLaMA config, contexts and the number
of new tokens; ANSWER gets one line of JSON a case and context: seconds to the first token, and of each token after it.
"""

import json
import statistics
import sys
import time


def main() -> None:
    with open(sys.argv[1]) as file:
        request = json.load(file)
    for case in request["cases"]:
        for context in case["contexts"]:
            result = {"size": case["size"], "context": context}
            try:
                result.update(measure(case, context))
            except Exception as error:
                result["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            with open(sys.argv[2], "a") as file:
                file.write(json.dumps(result) + "\n")


def measure(case: dict, context: int) -> dict:
    import torch
    import transformers

    config = transformers.LlamaConfig(**case["config"], use_cache=True)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(
            config, attn_implementation="sdpa", dtype=getattr(torch, case["dtype"])
        ).eval()
    ids = torch.randint(0, config.vocab_size, (1, context), device="cuda")
    times: list[float] = []

    def ended(input_ids, scores, **_):
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    criteria = transformers.StoppingCriteriaList([ended])
    first = []
    for run in range(2):  # the first run warms up
        times.clear()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=4,
                max_new_tokens=case["new_tokens"] if run else 4, pad_token_id=0, stopping_criteria=criteria,
            )  # fmt: skip
        first.append(times[0] - start)
    tokens = [after - before for before, after in zip(times, times[1:])]
    return {
        "torch": torch.__version__, "transformers": transformers.__version__, "prefill": first[-1],
        "token": statistics.median(tokens), "tokens": tokens, "peak_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
