"""The operation: arrays in, arrays out. Nothing here knows Flax or files.

shapes, hashing, masking, state   the parts of the definition
reference                         the definition itself, slow and plain, for tests and readers
xla/                              the operation in plain XLA
dispatch, implementations         which implementation runs, and why
checks, attention                 the public operation
"""
