"""What `tlm bench NAME` measures: a module each, whose `bench(config)` returns the exit status."""

BENCHES = {  # name: what it does, and the class in config.py that lists its keys
    "train": ("training steps beside those of transformers and its Trainer: speed, parts, growth", "BenchConfig"),
    "retrieval": ("BM25 engines side by side: queries, indexing, memory, growth", "BenchConfig"),
    "resume": ("runs that are killed at random instants, against one that was not", "BenchConfig"),
    "kernels": ("the CPU kernels beside those of torch, ONNX Runtime and bitsandbytes", "KernelsConfig"),
    "gpu-kernels": ("FP8 kernels beside cuBLAS, torch._scaled_mm and torchao, on a GPU", "GpuKernelsConfig"),
    "quant": ("trained runs in fewer bits: scores on dev, size, latency, throughput", "QuantConfig"),
    "lowbit": ("training by each recipe of few bits beside fp32, over tasks and seeds", "LowbitConfig"),
    "zeroprompt": ("arms of `tlm pretrain` at equal FLOPs, scored on categories never seen", "ZeropromptConfig"),
    "zeroshot": ("choices a second of `tlm eval` beside lm-eval on the exported run", "ZeroshotConfig"),
    "recipe": ("a recipe over the yardstick's tasks at equal FLOPs", "RecipeConfig"),
}
