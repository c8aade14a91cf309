"""The bounds that every part shares. They make the size of a ledger record provable: see RECORD_BYTES_MAX."""

SCHEMA_VERSION = 1

BATCH_EVENTS_MAX = 1_000
BATCH_BYTES_MAX = 1_000_000

# A record holds its input (1 MB at most) and per event, at worst, one window, one account (2.8 KB), one lease, three budgets
# (1.1 KB), or one dropped entry; beside their names, which the input has, that is 4.8 KB. What it lets go: windows' names and,
# beside so much usage, 0.3 MB of periods' lines; credit and budgets of periods that end, and leases of an earlier start: 0.2 MB
# and 0.7 MB of accounts. A month's end over a full batch of 1,000 tenants, each with the longest terms and names, comes to 6.5
# MB, to which rules that act on all of them add half a MB.
RECORD_BYTES_MAX = 8_000_000

# Of an identifier: tenant, project, user, key, model, request.
ID_CHARS_MAX = 256
# An event of at most this many bytes cannot hold a text over its bound: the step then need not look at each.
PLAIN_EVENT_BYTES_MAX = ID_CHARS_MAX
# Of one quantity of one event; the sum of a million such events still fits in 64 bits.
QUANTITY_MAX = 2**40
UNITS_MAX = 8
UNIT_CHARS_MAX = 32
ATTRIBUTES_MAX = 64
ATTRIBUTE_CHARS_MAX = 256
# Year 2286: a time beyond it is a unit mistake (microseconds sent as milliseconds).
TIME_MS_MAX = 9_999_999_999_999

ALERT_REQUEST_IDS_MAX = 10
# Of the request IDs that one alert names.
ALERT_ID_BYTES_MAX = 1_024
ALERT_NOTE_CHARS_MAX = 256
# Of one partition; what a rule finds beyond it is told when others are resolved.
ALERTS_ACTIVE_MAX = 10_000
# What rules do to one tenant at the same time, and the keys that they may name: every record that touches the tenant states it.
RESTRICTIONS_MAX = 4
RESTRICTED_KEY_BYTES_MAX = 64
RULE_ACTIONS_MAX = 16
# Models whose recount one batch may speak of.
COUNT_DRIFTS_MAX = 64
# Places remembered of one key, keys of one tenant, and events of one batch that are asked where they came from.
KEY_PLACES_KEPT = 16
PLACE_CHARS_MAX = 64
PLACED_KEYS_MAX = 1_000
PLACE_SAMPLES = 32
# Of one record, raised, moved or resolved; a rule that could not speak is not silenced, it speaks with the tenant's next usage.
ALERTS_MAX = 256
# Before a window is followed by another one of the same minute: its sums fit in 64 bits, its units in a record.
WINDOW_EVENTS_MAX = 2**23
WINDOW_UNITS_MAX = 16
# Prices kept apart in a window before another one follows; and by one that a single batch fills, the others are summed.
WINDOW_PARTS_MAX = 16
WINDOW_PARTS_HARD_MAX = 32
# What a minute counts for in the burst rule at most: its baseline, in 1/256, fits in 64 bits.
MINUTE_TOKENS_MAX = 2**55
# The same of the burn rate: four million units a minute, in pico.
MINUTE_COST_PICO_MAX = 2**62
# A plan, its tenant's display name and calendar together: every record that touches the tenant states them.
ACCOUNT_TERMS_BYTES_MAX = 2_048
# Four names in the longest encoding, a hash, scopes and limits.
KEY_BYTES_MAX = 8_192
# Windows let go by one record, and the bytes of their names (no fewer than one record can open); more wait for the next.
RELEASED_WINDOWS_MAX = 2_000
RELEASED_BYTES_MAX = BATCH_BYTES_MAX
# Lines of one period of one tenant, their names, and prices kept apart in one; what is more is summed in lines of "(other)".
LINES_MAX = 1_000
LINE_NAMES_BYTES_MAX = 200_000
LINE_PARTS_MAX = 64
# Of lines that one record states, as far as windows are let go: less where the record has much usage of its own.
LINES_BYTES_MAX = 1_000_000
LINES_BYTES_BESIDE_USAGE_MAX = 300_000
BUSY_RECORD_WINDOWS = 500
# What one part of a line takes in a record: its quantity's name, its terms, its numbers.
LINE_PART_BYTES = 120
# Ranges remembered beyond a hole in a producer's numbering; the furthest are forgotten, and counted missing until they are sent
# again.
PRODUCER_RANGES_MAX = 64
# A number beyond it is nonsense: at a million events a second it would take 140 years.
SEQUENCE_MAX = 2**52
# Alerts about producers in one record, each with a mark (64 ranges: 3 KB); more wait for the next.
PRODUCER_ALERTS_MAX = 50
# Gateways that hold leases in one partition, and leases let go by one record, when an operator retires a gateway and beside its
# usage; more wait for the next.
LEASE_HOLDERS_MAX = 1_000
RELEASED_LEASES_MAX = 1_000
SETTLED_LEASES_MAX = 100
# Of a grant's name, and of its reference.
CREDIT_NAME_BYTES_MAX = 256
# Of one tenant: grants with something left, grants that are known, and parts of its spend that no invoice has. Of all that is
# stated of one tenant at once, that is 130 KB at most.
GRANTS_LIVE_MAX = 100
GRANTS_KEPT_MAX = 10_000
UNINVOICED_PARTS_MAX = 200
# Of one tenant; and of a budget's names in all, so that three budgets of each event of a batch are small.
PROJECTS_MAX = 10_000
BUDGETS_MAX = 10_000
BUDGET_NAME_BYTES_MAX = 256
BUDGET_THRESHOLDS_MAX = 8
# Of one record; a threshold that could not warn warns with the budget's next usage.
BUDGET_ALERTS_MAX = 64
# Keys that are revoked at once when a tenant is closed; a repeat revokes more.
CLOSED_KEYS_MAX = 500
# Keys of one user that one command takes over; the record states each of them.
ERASED_KEYS_MAX = 500
# What one record may state of expiries and of periods that end, and one tenant more; more wait for the next.
CREDIT_BYTES_MAX = 100_000
# The same in tenants, for the record states their accounts as well.
CREDIT_TENANTS_MAX = 100
# An invoice beyond this tells projects and models apart no longer; and the texts that whoever finalises gives.
INVOICE_BYTES_MAX = 2_000_000
INVOICE_TEXTS_MAX = 40
INVOICE_TEXT_CHARS_MAX = 200
SERIES_PREFIX_CHARS_MAX = 16
TAXES_MAX = 8
# Lines of one adjustment, and events that it corrects: its command stays small, and its record in its bound.
ADJUSTMENT_LINES_MAX = 500
ADJUSTMENT_EVENTS_MAX = 1_000
# Lines of adjustments that a tenant gathers until an invoice takes them, and their names, which that record states; and
# corrected events that a partition remembers.
ADJUSTMENT_LINES_KEPT_MAX = 20_000
ADJUSTMENT_NAMES_BYTES_MAX = 1_000_000
CORRECTED_EVENTS_MAX = 1_000_000
REJECTED_PAYLOAD_BYTES_MAX = 65_536
# Of a ring of keys.
KEY_ID_CHARS_MAX = 64
KEYS_MAX = 100
# Forged records that one record describes; and what is kept of one's claim of who wrote it.
REFUSED_RECORDS_NAMED = 10
WRITER_CHARS_MAX = 200
# Registrations of producers, and their bytes: a founding record states all of them.
REGISTRATIONS_MAX = 1_000
REGISTRATIONS_BYTES_MAX = 500_000
