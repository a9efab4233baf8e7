"""Checkpoints in and out, in the order in which a byte meets these files.

documents.py     JSON files: read with suspicion, written completely or not at all
headers.py       safetensors headers, every number checked
bins.py          PyTorch .bin files, described like safetensors
hub.py           Hugging Face Hub ids to local directories
companions.py    tokenizer, processors: what is copied along
findings.py      what a directory without weights does hold
checkpoint.py    a model directory: tensors, config, companion files
remote.py        Hub ids described before they are downloaded
fused.py         experts that one model stores fused
architecture.py  what transformers knows of a model: ties, old names, constants
names.py         two ways to name the same tensors: wrappers, patterns
resolving.py     names of two models made to agree
leftover.py      what two models do not have in common: --skip, or refused
dtypes.py        parameters in floating point, or refused
matching.py      which tensors of two models belong together; ties
vocabulary.py    which rows of an embedding two models have in common
adapters.py      LoRA adapters: what they add to which tensors
settings.py      settings that change what weights do
task_vector.py   task_vector.json: its base, its hashes
layout.py        output files, planned to the last byte
places.py        is the place free, is there room
processes.py     several processes of one job
job.py           one job: claim or resume, stream, publish
publish.py       the steps of that: claim, resume, publish, discard
stream.py        tensors through worker threads
blocks.py        a reader for each input tensor, a writer for each output slot
buffers.py       what a thread holds of its files, in memory it reuses
direct.py        between memory and disk, past the page cache
sink.py          shard files while they are written
memory.py        the same into a model in memory
staging.py       files and directories that appear complete or not at all
systems.py       what a system may lack, and how to do without
hashing.py       xxh3 of texts, files and tensors
verify.py        is a directory still what was written
"""
