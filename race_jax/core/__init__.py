"""The RACE attention operation, as functions of arrays. Nothing here depends on Flax or on files.

shapes, hashing, masking          the parts of the definition
scan, state                       how the sums of adjoining spans combine; the state of a span
reference                         a slow and plain implementation of the definition, for tests
xla/                              the operation in plain XLA
passes                            the steps of a backend, with a scan between them
dispatch, implementations         the choice of an implementation, and the reason for it
shards                            sharded arguments, and calls inside ``jax.shard_map``
linear                            linear attention for any feature map
checks, attention                 the public operation
"""
