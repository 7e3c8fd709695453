"""llama-server, as xllamacpp packs it: MODEL PORT CONTEXT SLOTS. Runs until it is killed."""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames = ["127.0.0.1"]
params.port = int(sys.argv[2])
params.n_parallel = int(sys.argv[4])
params.n_ctx = int(sys.argv[3]) * params.n_parallel
params.cpuparams.n_threads = 1
params.warmup = False
server = xllamacpp.Server(params)
print("listening at", server.listening_address, flush=True)
threading.Event().wait()
