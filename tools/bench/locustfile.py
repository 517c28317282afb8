"""Load on a running compositor, with locust's own options and web page:

    locust -f tools/bench/locustfile.py --host HOST:PORT --tenants a,b,c

    --tenants a,b,c      the tenants, the most wanted first; default: all of --repository (model_repository)
    --zipf 1.0           exponent of their popularity; 0: all alike
    --flat-out           ask again at once, without watching each speech to its end
    --call-timeout 60    longest that a speech may take, seconds

`lipsync bench load` runs the same viewers and writes a report. For another mix, inherit from `Viewer` in a locustfile
of your own: `weight`, `wait_time` and further tasks are locust's.
"""

from __future__ import annotations

from lipsync.bench.viewer import Viewer

__all__ = ["Viewer"]
