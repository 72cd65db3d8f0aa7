"""Building blocks that papers share. Imports nearest and ground; torch."""
