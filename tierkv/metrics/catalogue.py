"""Every metric of a cache, of a server and of the daemon. `tierkv metrics` prints this list."""

from __future__ import annotations

from tierkv.metrics.metric import Kind, Metric

__all__ = [
    "CACHE_BY_REASON",
    "CACHE_BY_TIER",
    "CACHE_INFO",
    "CACHE_TOTALS",
    "DAEMON_BY_REASON",
    "DAEMON_BY_TIER",
    "DAEMON_INFO",
    "DAEMON_LIMITS",
    "DAEMON_NAMESPACES",
    "DAEMON_REMOTE_EVENTS",
    "DAEMON_TENANTS",
    "DAEMON_TOTALS",
    "REMOTE_CALL_SECONDS",
    "REMOTE_EVENTS",
    "REMOTE_UP",
    "SERVER_BY_LABEL",
    "SERVER_FIRST_TOKEN",
    "SERVER_TOTALS",
    "groups",
]


def _counter(name: str, text: str, *labels: str, source: str = "") -> Metric:
    return Metric(name, Kind.COUNTER, text, labels, source or name.rpartition("tierkv_")[2])


def _gauge(name: str, text: str, *labels: str, source: str = "") -> Metric:
    return Metric(name, Kind.GAUGE, text, labels, source or name.rpartition("tierkv_")[2])


# --- A cache: a process that calls serve_metrics, and `tierkv serve`. source: a field of CacheStats or TierStats ------

CACHE_INFO = Metric(
    "tierkv_cache",
    Kind.INFO,
    "The model and the blocks of this cache; tenant is the start of the salt's digest.",
    ("model", "namespace", "tenant", "dtype", "block_size", "block_bytes"),
)
CACHE_TOTALS = (
    _counter("tierkv_requests", "Requests that acquired a sequence."),
    _counter("tierkv_prompt_tokens", "Tokens of their prompts."),
    _counter("tierkv_collisions", "Lookups that met another block with the same hash; each cost a miss."),
    _counter("tierkv_prefetched_blocks", "Blocks brought into the warm tier before a request."),
    _gauge("tierkv_fragmentation_ratio", "Share of the free hot blocks outside the longest free run."),
    _gauge("tierkv_state_files", "State files that are loaded and open."),
    _gauge("tierkv_shared_blocks", "Mean blocks that a live sequence shares with another.", source="avg_shared_blocks"),
)
CACHE_BY_REASON = (
    _counter("tierkv_misses", "Blocks that no tier answered, by reason.", "reason", source="miss_reasons"),
    _counter("tierkv_prefetch_misses", "Blocks that a prefetch could not bring, by reason.", "reason"),
    _counter(
        "tierkv_skipped_writes",
        "Blocks that were not written to a lower tier, by reason.",
        "reason",
        source="skip_reasons",
    ),
)
CACHE_BY_TIER = (
    _counter("tierkv_hits", "Blocks that the tier answered.", "tier"),
    _counter("tierkv_hit_tokens", "Prompt tokens that the tier answered.", "tier"),
    _counter("tierkv_evictions", "Blocks that the tier forgot to make room.", "tier"),
    _counter("tierkv_written_bytes", "Bytes of blocks written into the tier.", "tier", source="bytes_in"),
    _counter("tierkv_read_bytes", "Bytes of blocks read from the tier.", "tier", source="bytes_out"),
    _gauge("tierkv_blocks", "Blocks that the tier holds.", "tier"),
    _gauge("tierkv_used_bytes", "Bytes of these blocks as the model uses them.", "tier"),
    _gauge("tierkv_stored_bytes", "Bytes that they take in the tier.", "tier"),
    _gauge("tierkv_capacity_bytes", "Bytes that the tier may take.", "tier"),
)

REMOTE_UP = _gauge("tierkv_remote_up", "1 if the remote tier is asked, 0 while it has failed.", "remote")
REMOTE_EVENTS = _counter(
    "tierkv_remote_events",
    "What happened: hits, bytes, and each reason of a miss, a failure or a dropped write.",
    *("remote", "event"),
)
REMOTE_CALL_SECONDS = Metric(
    "tierkv_remote_call_seconds", Kind.HISTOGRAM, "Seconds of the calls, by kind.", ("remote", "call")
)

# --- `tierkv serve`. source: an attribute of Monitor, if it has one ---------------------------------------

SERVER_TOTALS = (
    _counter("tierkv_serve_prompt_tokens", "Tokens of the prompts of finished answers.", source="prompt_tokens"),
    _counter("tierkv_serve_cached_tokens", "Those of them that were in the cache.", source="cached_tokens"),
    _counter("tierkv_serve_new_tokens", "Tokens generated.", source="new_tokens"),
    _counter("tierkv_serve_saved_seconds", "Seconds of computing prompts that the cache has saved.", source="saved_s"),
    _counter("tierkv_serve_preempted", "Times that an answer was interrupted for a more urgent one."),
    _gauge("tierkv_serve_running", "Answers that are computed."),
    _gauge("tierkv_serve_waiting", "Answers that wait for their turn."),
)
SERVER_BY_LABEL = (
    _counter("tierkv_serve_answers", "Answers, by what ended them.", "outcome", source="outcomes"),
    _counter(
        "tierkv_serve_requests", "Requests to /v1, by the HTTP status of the answer.", "status", source="statuses"
    ),
)
SERVER_FIRST_TOKEN = Metric("tierkv_serve_first_token_seconds", Kind.HISTOGRAM, "Seconds to the first token.")

# --- The daemon. source: a field of StatusReport, or the name of a counter in it --------------------------------------

DAEMON_INFO = Metric("tierkv_daemon", Kind.INFO, "The daemon's version.", ("version",))
DAEMON_TOTALS = (
    _gauge("tierkv_daemon_uptime_seconds", "Seconds since the daemon started.", source="uptime_s"),
    _gauge("tierkv_daemon_own_memory_bytes", "Memory of the process without the shared memory.", source="rss_bytes"),
    _gauge("tierkv_daemon_clients", "Open connections.", source="clients"),
    _counter("tierkv_daemon_received_bytes", "Bytes received over the socket.", source="bytes_received"),
    _counter("tierkv_daemon_sent_bytes", "Bytes sent over the socket.", source="bytes_sent"),
    _counter("tierkv_daemon_matched_blocks", "Blocks that clients asked for and that were there."),
    _counter("tierkv_daemon_published_blocks", "Blocks that clients have put into the warm tier."),
    _counter("tierkv_daemon_stored_blocks", "Published blocks that are in the store."),
    _counter("tierkv_daemon_loaded_blocks", "Blocks read from the store or a state file into the warm tier."),
    _counter("tierkv_daemon_prefetched_blocks", "Those of them that were read before a request."),
    _gauge("tierkv_daemon_reader_processes", "Processes that are ready to decode blocks of the store."),
    _counter("tierkv_daemon_reader_blocks", "Blocks that they have decoded."),
    _counter("tierkv_daemon_reader_failures", "Reader processes that ended or did not answer."),
    _gauge("tierkv_daemon_remotes_up", "Remote tiers that are asked."),
)
DAEMON_BY_REASON = (
    _counter("tierkv_daemon_missed_blocks", "Blocks that clients asked for and that were not there.", "reason"),
    _counter("tierkv_daemon_skipped_writes", "Published blocks that were not stored, by reason.", "reason"),
    _counter("tierkv_daemon_refused_messages", "Messages that were refused, by the kind of error.", "reason"),
)
DAEMON_BY_TIER = (
    _gauge("tierkv_daemon_blocks", "Blocks that the tier holds.", "tier"),
    _gauge("tierkv_daemon_used_bytes", "Bytes that they take in the tier.", "tier"),
    _gauge("tierkv_daemon_capacity_bytes", "Bytes that the tier may take.", "tier"),
    _counter("tierkv_daemon_evictions", "Blocks that the tier forgot, to make room or on demand.", "tier"),
)
_NAMESPACE = ("namespace", "model", "tenant")
DAEMON_NAMESPACES = (
    _gauge("tierkv_daemon_namespace_blocks", "Blocks of a namespace in the warm tier.", *_NAMESPACE),
    _gauge("tierkv_daemon_namespace_bytes", "Bytes of these blocks.", *_NAMESPACE),
    _gauge("tierkv_daemon_namespace_pinned_bytes", "Bytes of those of them that are pinned.", *_NAMESPACE),
    _gauge("tierkv_daemon_namespace_clients", "Clients that use the namespace.", *_NAMESPACE),
)
_TENANT = ("tenant", "tier")
DAEMON_TENANTS = (
    _gauge("tierkv_daemon_tenant_bytes", "Bytes of a tenant's blocks in the tier.", *_TENANT, source="bytes"),
    _gauge("tierkv_daemon_tenant_share_bytes", "Bytes that others cannot take from it.", *_TENANT, source="share"),
    _gauge(
        "tierkv_daemon_tenant_limit_bytes",
        "Bytes that it never exceeds; absent without a limit.",
        *_TENANT,
        source="limit",
    ),
)
DAEMON_REMOTE_EVENTS = _counter(
    "tierkv_daemon_remote_events",
    "What happened in all remote tiers: hits, bytes, and each reason of a miss, a failure or a dropped write.",
    "event",
)
DAEMON_LIMITS = (
    _gauge("tierkv_daemon_limit_used", "What clients hold of something that is bounded.", "resource", source="used"),
    _gauge("tierkv_daemon_limit", "How much of it all clients together may hold.", "resource", source="limit"),
)


def groups() -> dict[str, tuple[Metric, ...]]:
    """Return all metrics by what shows them."""
    return {
        "cache": (
            CACHE_INFO,
            *CACHE_TOTALS,
            *CACHE_BY_TIER,
            *CACHE_BY_REASON,
            REMOTE_UP,
            REMOTE_EVENTS,
            REMOTE_CALL_SECONDS,
        ),
        "serve": (*SERVER_TOTALS, *SERVER_BY_LABEL, SERVER_FIRST_TOKEN),
        "daemon": (
            DAEMON_INFO,
            *DAEMON_TOTALS,
            *DAEMON_BY_TIER,
            *DAEMON_BY_REASON,
            *DAEMON_NAMESPACES,
            *DAEMON_TENANTS,
            DAEMON_REMOTE_EVENTS,
            *DAEMON_LIMITS,
        ),
    }
