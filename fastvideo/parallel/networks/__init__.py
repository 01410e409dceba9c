"""Sequence parallelism for diffusers' transformers, one file a model, by attention processors and hooks: their code stays as it is.

Each file has `parallelize(transformer, ranks)`: from then on the processes of `ranks.sp_group` share the image tokens inside
`transformer`, whose inputs and outputs stay whole. With sp_size 1 nothing happens, but that HunyuanVideo is rid of its attention masks.
Raises UserError for fewer attention heads than sp_size.
"""
