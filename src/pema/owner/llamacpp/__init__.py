"""llama.cpp as the PLM's owner: its server, behind the contract."""
