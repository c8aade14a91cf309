"""The domain of Taximeter, pure: quantities, money, prices, windows, accounts, abuse rules and the ledger's step function.

Nothing here reads a clock, a socket, a file or a source of randomness, and no amount is ever a float: the same inputs give
the same result on every machine, today and in an audit ten years from now.
"""
