"""What ties the package to its host frameworks: one file each. Importing this package imports none of them."""
