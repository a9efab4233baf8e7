"""Checkpoints in and out, in the order in which a byte meets these files.

documents.py     JSON files: read warily, written whole
headers.py       safetensors headers, every number checked
bins.py          PyTorch .bin files, described like safetensors
hub.py           Hugging Face Hub ids to local directories
companions.py    tokenizer, processors: what goes along
findings.py      what a directory without weights holds
checkpoint.py    a model directory: tensors, config, companion files
matching.py      which tensors of two models belong together; ties
task_vector.py   task_vector.json: its base, its hashes
layout.py        output files, planned to the last byte
places.py        is the place free, is there room
processes.py     several processes of one job
job.py           one job: claim or resume, stream, publish
publish.py       the steps of that: claim, resume, publish, discard
stream.py        blocks of tensors through worker threads
buffers.py       what a thread holds of its files
direct.py        between memory and disk, past the page cache
sink.py          shard files while they are written
staging.py       files and directories that appear whole or not at all
systems.py       what a system may lack: stepped down from
hashing.py       xxh3 of texts, files and tensors
verify.py        is a directory still what was written
"""
