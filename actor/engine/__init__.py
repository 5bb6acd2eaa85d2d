"""One protocol (`base`), several engines. An engine knows prefixes and tokens, never tickets."""
