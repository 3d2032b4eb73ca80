"""Many compressions of the same checkpoints under one harness: what each operator loses."""
