"""What the routers of an MoE do, in numbers and on a page: sums in one pass, statistics of them, a report."""
