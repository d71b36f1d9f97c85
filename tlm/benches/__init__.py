"""What `tlm bench NAME` measures: a module each, whose `bench(config)` returns the exit status."""

BENCHES = {"train": "training steps beside those of transformers and its Trainer, where their time goes, how they grow"}
