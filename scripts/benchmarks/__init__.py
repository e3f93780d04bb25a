"""What the benchmark commands are made of, in the order in which a benchmark uses it.

arrays       draws random inputs, also those that fill most of a device
programs     `Program`: a name, a function, its inputs, and the least work it could do
timing       `time_program`: time and memory of a program; the only module that reads a clock
attention    attention operations as programs
peak_table   RACE and softmax on any machine, in percent of its matrix product peak
floor_table  RACE and softmax on a GPU, in percent of the time that moving the bytes takes
streamed     RACE over a sequence whose queries, keys and values would not fit
scaling      time and memory over length, each point in a process of its own, until a limit
text, plot, scaling_figure   tables as markdown, and figures of time and memory over length

A new benchmark is one file here that makes programs and prints what `time_program` returns, and one
command in scripts/ that reads its options.
"""
