"""Many messages, many processes: from a job to its report.

job.py        what is asked (Job, Options) and what was done (Report)
run.py        encrypt, decrypt, verify, rekey as straight lines
spans.py      files into tasks: many small ones together, one large one in spans of whole frames
worker.py     the hot loop: read_at, seal or open, write_at
pool.py       tasks to threads or processes, a bounded number in flight
manifest.py   the names, sizes and message ids of a tree; itself a message
"""
