"""One cache per rank of a model that several GPUs share, all agreeing on what each brought up."""
