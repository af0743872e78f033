"""One model behind HTTP: rows that share forwards (`engine`), the interfaces (`server`) and their protection."""
