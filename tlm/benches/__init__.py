"""What `tlm bench NAME` measures: a module each, whose `bench(config)` returns the exit status.

`tlm bench recipe` and `tlm bench kernels` have keys of their own and are verbs of two words.
"""

BENCHES = {
    "train": "training steps beside those of transformers and its Trainer, where their time goes, how they grow",
    "retrieval": "BM25 engines side by side: queries, indexing, memory, growth",
    "resume": "runs that are killed at random instants, against one that was not",
}
