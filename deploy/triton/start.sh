#!/bin/bash
# Runs tritonserver for the compositor: explicit model control, gRPC and metrics only, and loading, unloading and shared
# memory for those alone who have the key. Further arguments go to tritonserver.
set -euo pipefail
umask 077

key=/run/lipsync/triton.key
if ! [ -s "$key" ]; then
    # Renamed into place: whoever sees it sees all of it.
    od -An -vtx1 -N32 /dev/urandom | tr -d ' \n' >"$key.new"
    mv "$key.new" "$key"
fi

# What a server that crashed left in the shared memory, which is this server's own.
rm -f /dev/shm/triton_*_backend_shm_region_*

# An unknown option would end the server: it shows its help first, and with status 1.
help=$(tritonserver --help 2>&1 || true)
options=()
case $help in
*--allow-client-shm*) options+=(--allow-client-shm=true) ;;
esac

exec tritonserver \
    --model-repository=/models \
    --model-control-mode=explicit \
    --disable-auto-complete-config \
    --strict-readiness=false \
    --grpc-restricted-protocol="model-repository,shared-memory,trace,logging:lipsync-key=$(cat "$key")" \
    --allow-http=false \
    --metrics-address=0.0.0.0 \
    --exit-timeout-secs=20 \
    "${options[@]}" "$@"
