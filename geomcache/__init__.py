"""geomcache: an offline geometry feature cache for robot-learning policies.

The rooms (``cache_schemas``, ``pipeline``, ``stages``, ``configs``) stand at the top level of the
repository; this folder links to them so that they are importable as ``geomcache.<room>``.
"""

__version__ = "0.1.0"
