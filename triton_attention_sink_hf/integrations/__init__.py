"""What the host frameworks tell a layer beside q, k and v, one file per source. Imports none of the hosts."""
