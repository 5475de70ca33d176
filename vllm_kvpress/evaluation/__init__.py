"""What a policy costs: answers, memory and speed on the engine, and the tables made of them.

grid.py        what to measure: policies x keep ratios x tasks x lengths
models.py      is there such a model, and how long may its prompts be
run.py         one engine after another, each in a process of its own; resumes
runner.py      that process; with forced.py all that imports vLLM here
forced.py      questions that come when the cache is compressed already
items.py       prompts, and what counts as a right answer
observe.py     blocks held and time taken, seen in the engine's scheduler
records.py     results.jsonl
estimates.py   accuracies and paired differences with their errors
tables.py plots.py     what people read
tasks/         the same questions for lm-eval
"""
